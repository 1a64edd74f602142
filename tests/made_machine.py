"""What `m6 doctor` might measure of a small machine without GPUs."""

MACHINE = {
    "cores": 2, "memory_bytes": 24_000_000_000, "memory_rate": 12e9, "thread_rate": 12e9, "all_to_all": 1.2e9,
    "matmul_flops": {"bf16": 180e9, "fp32": 60e9}, "process_bytes": 450_000_000, "disk_bytes": 60_000_000_000,
    "disk_read": 1e9, "disk_write": 1.5e9,
}  # fmt: skip
