"""The sheets of `make demo`, one file a capability: pictures made with the models of this project, and what they cost."""
