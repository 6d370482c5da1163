"""The methods whose terms are exposed. Importing this adds them to solo-learn's, if installed."""

from grap_solo.methods.all4one import GrapAll4One
from grap_solo.solo import register_method

METHODS = {"grap_all4one": GrapAll4One}
for _name, _method in METHODS.items():
    register_method(_name, _method)

__all__ = ["METHODS", "GrapAll4One"]
