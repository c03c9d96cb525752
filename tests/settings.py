"""Settings that several tests share, where not every one of them reads all."""

from typing import Any

from refine_nsp.config import NSPConfig
from refine_nsp.fields import SettingError


def fitting(**settings: Any) -> NSPConfig:
    """Make an NSPConfig of these settings, without those that the others leave unread: given, they would be refused."""
    try:
        return NSPConfig(**settings)
    except SettingError as error:
        return fitting(**{name: value for name, value in settings.items() if name not in error.names})
