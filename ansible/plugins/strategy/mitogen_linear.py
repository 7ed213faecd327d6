"""Ansible's linear strategy through Mitogen; without Mitogen the same result, in twice the time."""

from functools import cache

try:
    from ansible_mitogen import module_finder
    from ansible_mitogen.plugins.strategy.mitogen_linear import StrategyModule

    # For each module that it sends, Mitogen compiles all that the module imports of Ansible, to see what that imports.
    vars(module_finder)["compile"] = cache(compile)
except ImportError:
    from ansible.plugins.strategy.linear import StrategyModule

__all__ = ["StrategyModule"]
