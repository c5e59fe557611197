"""Schedulers that diffusers lacks, one family a file.

Each module is imported here eagerly: diffusers finds the class that a saved `scheduler_config.json` or `model_index.json`
names only if its module is already in `sys.modules`.
"""

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_adaptive_adams import AdaptiveAdamsScheduler
from .scheduling_bdia_ddim import BDIADDIMScheduler
from .scheduling_bdia_ddim_inverse import BDIADDIMInverseScheduler
from .scheduling_ctm import CTMScheduler
from .scheduling_evodiff import EVODiffScheduler
from .scheduling_flair import FLAIRScheduler
from .scheduling_flow_chef import FlowChefScheduler
from .scheduling_flow_chef_dpmsolver_multistep import FlowChefDPMSolverMultistepScheduler
from .scheduling_flow_chef_heun import FlowChefHeunScheduler
from .scheduling_flow_chef_lcm import FlowChefLCMScheduler
from .scheduling_flow_chef_unipc_multistep import FlowChefUniPCMultistepScheduler
from .scheduling_ghvb import GHVBScheduler
from .scheduling_heavy_ball_dpmsolver_multistep import HeavyBallDPMSolverMultistepScheduler
from .scheduling_heavy_ball_unipc_multistep import HeavyBallUniPCMultistepScheduler
from .scheduling_mean_reverting_adapter import MeanRevertingAdapter
from .scheduling_mr import MRScheduler
from .scheduling_resfusion import ResfusionScheduler
from .scheduling_rolling_ladder import RollingLadderScheduler


__all__ = [
    "AdaptiveAdamsScheduler",
    "BDIADDIMInverseScheduler",
    "BDIADDIMScheduler",
    "CTMScheduler",
    "EVODiffScheduler",
    "FLAIRScheduler",
    "FlowChefDPMSolverMultistepScheduler",
    "FlowChefHeunScheduler",
    "FlowChefLCMScheduler",
    "FlowChefScheduler",
    "FlowChefUniPCMultistepScheduler",
    "GHVBScheduler",
    "HeavyBallDPMSolverMultistepScheduler",
    "HeavyBallUniPCMultistepScheduler",
    "MRScheduler",
    "MeanRevertingAdapter",
    "ResfusionScheduler",
    "RollingLadderScheduler",
    "SchedulerMixin",
]
