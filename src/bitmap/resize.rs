//! Following a disk that grows or shrinks.

use super::{CreateError, HBitmap, new_storage};

impl HBitmap {
    /// Makes the map one of `len` bytes.
    ///
    /// Granules that lie past the new end as a whole are forgotten; one that the end cuts keeps its state,
    /// and so does the partial last one of a map that grows: the bytes which it gains share it. All other
    /// new bytes are clean. So whoever shrinks and grows again has forgotten what was dirty in between,
    /// although the disk may read differently there: mark what comes back.
    ///
    /// Costs a copy of the map if the number of granules changes.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), or [`OutOfMemory`](CreateError::OutOfMemory). The map is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use blockjob::{Granularity, HBitmap};
    ///
    /// let mut map = HBitmap::new((1 << 20) + 512, Granularity::DEFAULT)?;
    /// map.set_all();
    /// map.truncate(2 << 20)?;
    /// assert!(map.runs().eq([(0..(1 << 20) + 65536).into()]), "the last granule keeps its state");
    /// map.truncate(4096)?;
    /// assert!(map.runs().eq([(0..4096).into()]));
    /// # Ok::<(), blockjob::bitmap::CreateError>(())
    /// ```
    pub fn truncate(&mut self, len: u64) -> Result<(), CreateError> {
        let granules = HBitmap::new(len, self.granularity)?.granules();
        let before = self.granules();
        if granules == before || self.words.is_empty() {
            self.len = len;
            return Ok(());
        }
        let (mut words, mut summary) = new_storage(granules)?;
        if granules < before {
            self.reset_run(granules..before);
        }
        summary.take_over(&self.summary);
        for (block, words) in words.chunks_mut(64).enumerate() {
            let is_needed = summary.block(block).is_some_and(|pair| pair.mixed != 0);
            if is_needed {
                let from = self.words.get(block * 64..).unwrap_or_default();
                let both = words.len().min(from.len());
                words[..both].copy_from_slice(&from[..both]);
            }
        }
        self.words = words;
        self.summary = summary;
        self.len = len;
        Ok(())
    }
}
