"""Ansible's free strategy through Mitogen; without Mitogen the same result, in twice the time."""

try:
    from ansible_mitogen.plugins.strategy.mitogen_free import StrategyModule
except ImportError:
    from ansible.plugins.strategy.free import StrategyModule

__all__ = ["StrategyModule"]
