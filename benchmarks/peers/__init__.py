"""The same workloads in other frameworks, and as a centralised loop. Each needs only its framework, torch and NumPy."""
