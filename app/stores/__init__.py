"""Where pictures are kept: one module for each kind of place, the same contract for all."""

from pathlib import Path

from app.secret import derive, read_or_make
from app.settings import FolderSettings, S3Settings
from app.stores.links import Links
from app.stores.store import Store


def signing_secret(secret_file: str) -> bytes:
    """What signs the addresses of pictures, from the server's secret."""
    return derive(read_or_make(Path(secret_file)), "pictures")


def opened(settings: FolderSettings | S3Settings, secret: bytes) -> Store:
    """The store of the configuration. `secret` signs the addresses that this server answers itself."""
    if isinstance(settings, FolderSettings):
        from app.stores.folder import Folder

        return Folder(Path(settings.path), Links(secret, settings.base_url.rstrip("/")))
    from app.stores.s3 import S3

    options = settings.model_dump(include={"endpoint", "region"}, exclude_none=True)
    return S3(settings.bucket, prefix=settings.prefix, conditional_put=settings.conditional_put, **options)
