"""The paper's experiment (Shin et al. 2021, arXiv:2112.00384) on real digits, from data to report."""
