"""Run in an image for GPUs on a machine without one: import every module of ours, and what vLLM runs on GPUs.

CUDA builds link to NVIDIA's driver, which comes with a GPU's machine and not with the image. Its stand-in is compiled
here: it has each symbol that a package of the image links to, knows one GPU, and can do nothing with it.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

OURS = ("adapters", "bank", "demo", "evaluation", "mta_client", "server")
VLLM = ("_custom_ops", "v1.worker.gpu_worker", "v1.worker.gpu.model_runner", "lora.ops.triton_ops")
NO_DEVICE = "{ return 100; }"  # CUDA's own code for it
NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
"""


def needed() -> set[str]:
    """Return the driver's functions that libraries of this environment link to."""
    names = set()
    for library in Path(sysconfig.get_path("platlib")).rglob("*.so*"):
        if b"libcuda.so.1" in library.read_bytes():
            command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", str(library)]
            symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            names |= {name for name in symbols if name.startswith("cu") and name[2:3].isupper()}
    return names


def compile_driver(folder: Path) -> None:
    cuda = "\n".join(f"int {name}(void) {NO_DEVICE}" for name in {"cuInit", *needed()})
    for name, source in (("libcuda.so.1", cuda), ("libnvidia-ml.so.1", NVML)):
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)


def main() -> None:
    if "LD_LIBRARY_PATH" not in os.environ:  # which a process reads when it starts
        folder = Path(tempfile.mkdtemp())
        compile_driver(folder)
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_LIBRARY_PATH": str(folder)})
    import torch

    torch.cuda.is_available = lambda: True  # Triton asks before it defines a kernel
    found = (pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}.") for name in OURS)
    names = [f"vllm.{name}" for name in VLLM] + [
        module.name for package in found for module in package if not module.name.endswith("__main__")
    ]
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules imported")


if __name__ == "__main__":
    main()
