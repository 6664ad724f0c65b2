"""What methods cost, in time and memory, on models of real shapes with random weights, on this machine.

All variants take turns within each round (A B C A B C ...), so that drift of the machine hits all alike; ratios to the
untouched model are taken within rounds. Prefill and tokens are timed apart, inside `generate`.
"""
