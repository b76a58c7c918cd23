"""The core: the only floor that knows how a host is changed. It needs torch and safetensors, nothing else."""
