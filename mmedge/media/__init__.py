"""Frames with their times, from folders, videos and recordings, and files of ready vectors."""
