"""Processes, devices, files and runs: what every room stands on."""
