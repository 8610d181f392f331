"""XLA's flags for the tests, which compile fast rather than well: tests mostly compile."""

import importlib.metadata
import os

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_force_host_platform_device_count=8"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # an unknown flag aborts XLA
    FLAGS += (
        " --xla_cpu_use_fusion_emitters=false --xla_llvm_force_inline_before_split=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
# Flags from the user, such as --xla_cpu_max_isa=AVX2. A pytest worker inherits FLAGS before them.
USER_FLAGS = os.environ.get("XLA_FLAGS", "").removeprefix(FLAGS).strip()
ONE_DEVICE = f"{FLAGS} --xla_force_host_platform_device_count=1 {USER_FLAGS}"  # for commands
