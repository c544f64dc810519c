//! Several tasks that drive one job, and come and go.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;

use super::rng::Rng;
use super::world::Flag;

/// Runs so many of what `start` makes, each from its number, until one of them is over. Now and then one is dropped
/// wherever it is, though it may have been woken, and another takes its place. Polled once more, the others go on,
/// and another takes the place of that one, too.
pub(crate) struct Several<F, S, D> {
    start: S,
    members: Vec<Option<Member<F>>>,
    rng: Rng,
    /// Whether one is dropped now.
    drops: D,
}

type Member<F> = (Pin<Box<F>>, Arc<Relay>);

/// Wakes the task that has all of them, and notes whom it is for.
struct Relay {
    flag: Arc<Flag>,
    outer: Mutex<Option<Waker>>,
}

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.flag.clone().wake_it();
        if let Some(outer) = self.outer.lock().take() {
            outer.wake();
        }
    }
}

impl<F: Future, S: Fn(usize) -> F, D: FnMut(&mut Rng) -> bool> Several<F, S, D> {
    pub(crate) fn new(count: usize, drops: D, rng: Rng, start: S) -> Self {
        Self {
            start,
            members: (0..count).map(|_| None).collect(),
            rng,
            drops,
        }
    }
}

impl<F, S, D> Future for Several<F, S, D>
where
    F: Future,
    S: Fn(usize) -> F + Unpin,
    D: FnMut(&mut Rng) -> bool + Unpin,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        let members = this.members.iter_mut().enumerate();
        for (index, member) in members.filter(|(_, member)| member.is_none()) {
            let relay = Relay {
                flag: Flag::new(),
                outer: Mutex::default(),
            };
            *member = Some((Box::pin((this.start)(index)), Arc::new(relay)));
        }
        if this.members.len() > 1 && (this.drops)(&mut this.rng) {
            let dropped = this.rng.below(this.members.len() as u64) as usize;
            this.members[dropped] = None;
        }
        // Before any is polled, or one that is woken meanwhile would wake nobody.
        for (_, relay) in this.members.iter().flatten() {
            *relay.outer.lock() = Some(cx.waker().clone());
        }
        let first = this.rng.below(this.members.len() as u64) as usize;
        let (before, after) = this.members.split_at_mut(first);
        for slot in after.iter_mut().chain(before) {
            let Some((member, relay)) = slot else {
                continue;
            };
            if relay.flag.take() {
                let waker = Waker::from(Arc::clone(relay));
                let polled = member.as_mut().poll(&mut Context::from_waker(&waker));
                if polled.is_ready() {
                    *slot = None;
                    return polled;
                }
            }
        }
        // One that is gone is followed by another later, when there is something to do.
        Poll::Pending
    }
}
