"""What a row of a source holds that a model reads: chats, words, images, and texts to choose from."""
