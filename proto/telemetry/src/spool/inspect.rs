//! What stands on disk of a spool, for people: reads only, takes no lock, and works beside a living source.

use super::segment::Segment;
use crate::mapped::{self, CountersOnDisk};
use std::{
    io,
    path::{Path, PathBuf},
};

/// One life of a source, as its files tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LifeOnDisk {
    /// Its epoch.
    pub epoch: String,
    /// File of its counters. Whoever holds its lock is the life itself, or has taken it over.
    pub file: PathBuf,
    /// Its counters, or why they can't be told.
    pub counters: Result<CountersOnDisk, String>,
    /// Its segments, in the order in which they were written.
    pub segments: Vec<SegmentOnDisk>,
}

/// A segment: spans that wait for their export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentOnDisk {
    /// The file.
    pub path: PathBuf,
    /// First and last span in it, settled ones included; `None` when no sound one is in it.
    pub range: Option<(u64, u64)>,
    /// Spans in it that are not settled.
    pub held: u64,
    /// Bytes of it that are sound, from its beginning.
    pub sound_bytes: u64,
    /// Whether bytes follow that are no sound span. In the last segment of a life that goes on, that is a write under way.
    pub torn: bool,
}

/// Looks at a spool; lives are in the order of their epochs. A spool that does not exist has none.
///
/// # Errors
/// When the directory, or one of its lives, can't be read.
pub fn inspect(root: &Path) -> io::Result<Vec<LifeOnDisk>> {
    let entries = match std::fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut lives = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let Some(epoch) = name.to_str().filter(|name| uuid::Uuid::try_parse(name).is_ok()) else { continue };
        lives.extend(life(&root.join(epoch), epoch)?);
    }
    lives.sort_by(|a, b| a.epoch.cmp(&b.epoch));
    Ok(lives)
}

/// `None` for one that was settled and removed meanwhile.
fn life(directory: &Path, epoch: &str) -> io::Result<Option<LifeOnDisk>> {
    let file = directory.join(mapped::FILE);
    let counters = mapped::peek(&file).map_err(|error| error.to_string());
    let settled_through = counters.as_ref().map_or(0, |c| c.settled_through);
    let paths = match Segment::list(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut segments = Vec::new();
    for path in paths {
        match Segment::adopt(&path, settled_through) {
            Ok((segment, torn)) => segments.push(SegmentOnDisk {
                range: (segment.first > 0).then_some((segment.first, segment.last)),
                held: segment.held,
                sound_bytes: segment.bytes,
                torn,
                path,
            }),
            // Exported and freed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(LifeOnDisk { epoch: epoch.to_owned(), file, counters, segments }))
}
