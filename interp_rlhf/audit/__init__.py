"""Evidence on disk: hashes, the timeline, snapshots and their verification."""
