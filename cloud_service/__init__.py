"""Where devices meet: the cloud half of Isthmus."""
