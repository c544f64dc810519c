//! What a job does at the instant at which it starts.

use crate::bitmap::HBitmap;
use crate::node::{BitmapError, Locked, Node, QuiesceGuard};

/// Who has begun a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The caller, just now.
    Here,
    /// Somebody else, before.
    Before,
}

/// What a job must do while its guest is held, so that it has begun when the guest goes on. The job's own
/// machine sees to that, or the transaction that starts it.
pub(crate) trait AtStart: Send + Sync {
    /// The disk whose guest is held.
    fn node(&self) -> &Node;

    /// A map that [`arm`](Self::arm) may need, if there is memory for it.
    fn spare(&self) -> Option<HBitmap>;

    /// Does it. On error nothing has changed.
    fn arm(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
    ) -> Result<Begun, BitmapError>;

    /// Nothing that was done before is undone any more: the machine may go on with it.
    fn commit(&self);

    /// Undoes it, unless the machine has begun to work by then.
    fn disarm(&self, locked: &mut Locked<'_>);
}
