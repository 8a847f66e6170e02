"""Recurrent reinforcement learning with memoroids: the resettable scan that the scripts in `single_files/` use."""
