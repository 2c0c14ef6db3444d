"""What limits a process: system calls, files, resources."""
