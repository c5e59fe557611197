from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from .conftest import SCRIPTS, start


CONFIGS = {path.stem: path for path in sorted((SCRIPTS / "configs").glob("*.yaml"))}
SHARDED = {
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_every_value_of_a_config(name: str):
    written, read = yaml.safe_load(CONFIGS[name].read_text()), load_config_from_file(str(CONFIGS[name])).to_dict()
    assert {key: read.get(key) for key in written} == written


def test_each_config_is_of_the_kind_that_its_name_says():
    kinds = {name: load_config_from_file(str(path)) for name, path in CONFIGS.items()}
    one = {name for name, config in kinds.items() if config.distributed_type == DistributedType.NO}
    assert one == {"cpu_1", "gpu"} and all(kinds[name].num_processes == 1 for name in one)
    data_parallel = {name for name, config in kinds.items() if config.distributed_type == DistributedType.MULTI_GPU}
    assert data_parallel == {"cpu_2_gloo", "gpu_multi", "gpu_multi_node"}
    assert {
        name: config.distributed_type for name, config in kinds.items() if name not in one | data_parallel
    } == SHARDED
    nodes = kinds["gpu_multi_node"]
    assert (
        nodes.num_machines == 2 and nodes.num_processes % 2 == 0 and nodes.main_process_port and nodes.main_process_ip
    )
    assert [kinds[f"deepspeed_zero{stage}"].deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_the_keys_of_a_sharded_config_are_arguments_of_the_launcher(name: str):
    config = load_config_from_file(str(CONFIGS[name]))
    settings = config.fsdp_config or config.deepspeed_config
    known = vars(launch_command_parser().parse_args([f"--config_file={CONFIGS[name]}", "script.py"]))
    # those that it does not know would be dropped without a word
    assert settings and set(settings) <= set(known)


@pytest.mark.slow
@pytest.mark.reliability
def test_a_launch_with_a_sharded_config_ends_with_one_sentence(dmd_arguments: list[str], tmp_path: Path):
    arguments = [*dmd_arguments, f"--output_dir={tmp_path / 'run'}"]
    process = start(SCRIPTS / "train_dmd.py", arguments, CONFIGS["fsdp2"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "ValueError: distributed_type=FSDP spreads weights or moments over processes" in output
    assert "training/configs/gpu_multi.yaml" in output and not (tmp_path / "run").exists()
