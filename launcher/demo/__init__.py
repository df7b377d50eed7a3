"""The embedded demo model: its pictures, the script that trained it, and its evaluation."""
