"""Lightning, under whichever of its two names is installed."""

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'this part of lightning_integration needs Lightning: pip install "cot-kernels[lightning]"'
        ) from error

__all__ = ["pl"]
