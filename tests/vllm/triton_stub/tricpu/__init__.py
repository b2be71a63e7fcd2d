"""A backend of Triton for CPUs that compiles nothing.

Triton's interpreter (TRITON_INTERPRET=1) runs kernels without compiling them, but vLLM looks for
a backend named "cpu" before it takes its second model runner. Put the folder of this package on
PYTHONPATH to show it one.
"""
