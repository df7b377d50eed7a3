"""The building blocks of the models, split over ranks where they are large."""
