"""Profiles: what each member costs on each class of device, measured by workers' child processes and kept on disk.

`measurements` is pure: it says what was measured and what planning makes of it.
"""
