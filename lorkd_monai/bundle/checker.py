"""stub"""
from dataclasses import dataclass
@dataclass
class Problem: pass
def check_bundle(*a, **k): return []
