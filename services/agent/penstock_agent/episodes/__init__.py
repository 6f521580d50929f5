"""From tickets to groups of episodes: take, play, try again, keep what is finished, hand over."""
