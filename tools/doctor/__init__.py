"""What a machine offers cdist: versions, devices, attention kernels, a folder that keeps what is written."""
