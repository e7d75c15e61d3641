"""titan_fp8: FP8 in every GEMM of dense LLM pretraining, on torchtitan."""

__version__ = "0.1.0"
