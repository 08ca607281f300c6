"""One device: what this machine is, named devices, and whether and how fast a model runs on one."""
