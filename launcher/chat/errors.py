"""What can go wrong in a chat, as a sentence for the one who chats."""


class ChatError(Exception):
    """A picture, a file or the server said no. The message is all that the user sees."""
