//! What disks hold at first, and whether two show the same.

use blockjob::{Content, HBitmap, MirrorSync};

use super::disk::{BLOCK, Block, Disk};
use super::rng::Rng;

/// Fills a source with runs of data, zeroes, and what was discarded, in layers.
pub(crate) fn fill_source(disk: &mut Disk, rng: &mut Rng) {
    let mut index = 0;
    while index < disk.blocks.len() {
        let run = rng.between(1, 12) as usize;
        let content = match rng.below(4) {
            0 => Content::Zero,
            1 if rng.one_in(3) => Content::Undefined,
            _ => Content::Data,
        };
        let in_top = rng.one_in(2);
        for block in index..(index + run).min(disk.blocks.len()) {
            let start = block * BLOCK as usize;
            let end = (start + BLOCK as usize).min(disk.bytes.len());
            let byte = match content {
                Content::Zero => 0,
                Content::Data | Content::Undefined => rng.between(1, 255) as u8,
            };
            disk.bytes[start..end].fill(byte);
            disk.blocks[block] = Block { content, in_top };
        }
        index += run;
    }
}

/// What the target holds before the job: anything, or what the layers below give.
pub(crate) fn fill_target(source: &Disk, target: &mut Disk, sync: MirrorSync) {
    for block in 0..source.blocks.len() {
        let start = block * BLOCK as usize;
        let end = (start + BLOCK as usize).min(source.bytes.len());
        let shows_below = match sync {
            MirrorSync::Full => false,
            MirrorSync::Top => !source.blocks[block].in_top,
            MirrorSync::None => true,
        };
        if shows_below {
            target.bytes[start..end].copy_from_slice(&source.bytes[start..end]);
        } else {
            target.bytes[start..end].fill(0xaa);
        }
        target.blocks[block] = Block {
            content: Content::Data,
            in_top: !shows_below,
        };
    }
}

/// What a target holds besides that is a copy of the source but for what is dirty.
pub(crate) fn fill_copied(source: &Disk, target: &mut Disk, dirty: &HBitmap) {
    for block in 0..source.blocks.len() {
        let start = block * BLOCK as usize;
        let end = (start + BLOCK as usize).min(source.bytes.len());
        if !dirty.any_dirty_in(start as u64..end as u64) {
            target.bytes[start..end].copy_from_slice(&source.bytes[start..end]);
        }
    }
}

/// Whether the target shows what the source shows, wherever that is defined.
pub(crate) fn is_equal(pair: &[Disk], block: usize) -> bool {
    let [source, target] = pair else {
        panic!("a source and its target");
    };
    if source.blocks[block].content == Content::Undefined {
        return true;
    }
    let start = block * BLOCK as usize;
    let end = (start + BLOCK as usize).min(source.bytes.len());
    target.blocks[block].content != Content::Undefined
        && source.bytes[start..end] == target.bytes[start..end]
}
