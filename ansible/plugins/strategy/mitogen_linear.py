"""Ansible's linear strategy through Mitogen; without Mitogen the same result, in twice the time."""

from functools import cache

try:
    from ansible_mitogen import module_finder
    from ansible_mitogen.plugins.strategy.mitogen_linear import StrategyModule

    # To find a module's imports, Mitogen compiles all of Ansible that the module imports, for each module that it
    # sends.
    vars(module_finder)["compile"] = cache(compile)
except ImportError:
    from ansible.plugins.strategy.linear import StrategyModule

__all__ = ["StrategyModule"]
