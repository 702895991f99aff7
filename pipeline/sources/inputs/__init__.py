"""Read the inputs of a row: chats, words, images, choices and answers."""
