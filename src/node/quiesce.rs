//! Holding the guest's writes: closing the gate, and waiting until nobody is inside.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::gate::WaiterId;
use super::{Inner, Node};
use crate::sync::Arc;

/// Closes a node's gate and waits until the writes in flight have settled.
///
/// The gate is closed from the call of [`Node::quiesce`] on. Dropping this opens it again.
#[must_use = "the node is open again when this is dropped"]
pub struct Quiesce {
    /// `None` once a guard was given.
    node: Option<Arc<Inner>>,
    id: WaiterId,
}

/// While it lives no guest write is in flight, and none can begin.
#[must_use = "the node is open again when this is dropped"]
pub struct QuiesceGuard {
    node: Arc<Inner>,
}

impl Quiesce {
    pub(super) fn new(node: Arc<Inner>) -> Self {
        node.gate.close();
        let id = node.gate.new_waiter();
        Self {
            node: Some(node),
            id,
        }
    }

    /// The guard, if no write is in flight any more; else this again, with the gate still closed.
    ///
    /// # Errors
    ///
    /// `self`, if a write is still in flight.
    pub fn try_guard(mut self) -> Result<QuiesceGuard, Self> {
        match self.poll_guard(None) {
            Poll::Ready(guard) => Ok(guard),
            Poll::Pending => Err(self),
        }
    }

    /// The guard if no write is in flight any more; else the waker, if one is given, is called when it
    /// is worth asking again. Not to be called again once the guard was given.
    ///
    /// # Panics
    ///
    /// If the guard was given already.
    pub fn poll_guard(&mut self, waker: Option<&Waker>) -> Poll<QuiesceGuard> {
        let node = self.node.as_ref().expect("the guard was not given yet");
        if !node.gate.is_quiet(self.id, waker) {
            return Poll::Pending;
        }
        // The gate stays closed: the guard opens it in our place.
        let node = self.node.take().expect("taken just now");
        Poll::Ready(QuiesceGuard { node })
    }
}

impl Future for Quiesce {
    type Output = QuiesceGuard;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<QuiesceGuard> {
        self.poll_guard(Some(cx.waker()))
    }
}

impl Drop for Quiesce {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            node.gate.forget_quiescer(self.id);
            node.gate.open();
        }
    }
}

impl fmt::Debug for Quiesce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quiesce").finish_non_exhaustive()
    }
}

impl Drop for QuiesceGuard {
    fn drop(&mut self) {
        self.node.gate.open();
    }
}

impl QuiesceGuard {
    pub(super) fn is_of_inner(&self, node: &Arc<Inner>) -> bool {
        Arc::ptr_eq(&self.node, node)
    }

    /// Whether it quiesces `node`.
    #[must_use]
    pub fn is_of(&self, node: &Node) -> bool {
        self.is_of_inner(node.inner())
    }
}

impl fmt::Debug for QuiesceGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuiesceGuard").finish_non_exhaustive()
    }
}
