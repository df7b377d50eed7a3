"""The embedded demo model: the pictures it knows, the script that trained it, and its evaluation."""
