"""The benchmark of the LoRA-MoE linear: `wanmoe bench`, or without the command line's packages
`python -m wanmoe.kernels.bench`."""
