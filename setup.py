"""The compiled part of the CPU backend; everything else is said in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("cot_kernels/backends/native")

setup(
    ext_modules=[
        Extension(
            "cot_kernels.backends.native._rows",
            [str(source) for source in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(header) for header in sorted(NATIVE.glob("*.h"))],
            # One build serves every Python from 3.10 on.
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            # No -ffast-math: NaN and infinity keep their meaning.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"),
                *("-fvisibility=hidden", "-Wno-psabi", "-g0"),
            ],
            libraries=["dl"],
            language="c++",
            optional=True,  # without a compiler the CPU is served by PyTorch's own operations
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
