//! The loops over the caller's streams: short reads, errors, ends, dropped futures, the speed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blockjob::driver::Clock;
use blockjob::migration::driver::{
    DriveError, NoWayBack, ReadStream, Sent, WriteStream, answers, receive, send,
};
use blockjob::migration::{
    ArrivalState, Fault, IncomingEvent, IncomingOptions, Mode, OutgoingEvent, OutgoingOptions,
};
use blockjob::{IncomingError, IncomingMigration, Node, OutgoingError, OutgoingMigration};

use crate::cases::{LEN, bitmap, disk, id, is_stored, large, native, one, start, stop, write};
use crate::truth::bits_of;

/// Both directions of a connection.
#[derive(Clone, Default)]
struct Pipe(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// All writes, by their lengths.
    writes: Vec<usize>,
    /// After so many writes and reads one waits for ever, or fails.
    hangs_at: Option<usize>,
    fails_at: Option<usize>,
    calls: usize,
    /// Bytes that a read gives at most; 0 for all.
    read_max: usize,
    is_open: bool,
    /// What a read or a write does to the buffer.
    spoils: bool,
}

/// What a call of a stream comes to.
async fn call(state: &Rc<RefCell<State>>) -> io::Result<()> {
    let (hangs, fails) = {
        let mut state = state.borrow_mut();
        state.calls += 1;
        let is_it = |at: Option<usize>| at == Some(state.calls);
        (is_it(state.hangs_at), is_it(state.fails_at))
    };
    if hangs {
        std::future::pending::<()>().await;
    }
    if fails {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
}

impl WriteStream for Pipe {
    async fn write_all(&mut self, mut buf: Vec<u8>, len: usize) -> (io::Result<()>, Vec<u8>) {
        if let Err(error) = call(&self.0).await {
            return (Err(error), buf);
        }
        let mut state = self.0.borrow_mut();
        state.bytes.extend(&buf[..len]);
        state.writes.push(len);
        if state.spoils {
            buf = Vec::new();
        }
        (Ok(()), buf)
    }
}

impl ReadStream for Pipe {
    async fn read(&mut self, mut buf: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        if let Err(error) = call(&self.0).await {
            return (Err(error), buf);
        }
        let hangs = {
            let state = self.0.borrow();
            state.bytes.is_empty() && state.is_open
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        let mut state = self.0.borrow_mut();
        let most = if state.read_max == 0 {
            usize::MAX
        } else {
            state.read_max
        };
        let len = state.bytes.len().min(buf.len()).min(most);
        for (to, from) in buf.iter_mut().zip(state.bytes.drain(..len)) {
            *to = from;
        }
        if state.spoils {
            buf.truncate(len);
        }
        (Ok(len), buf)
    }
}

/// Time that passes only while somebody sleeps.
#[derive(Default)]
struct Slept {
    now: RefCell<Duration>,
    sleeps: RefCell<Vec<Duration>>,
    hangs: RefCell<bool>,
}

impl Clock for Slept {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    async fn sleep_until(&self, time: Duration) {
        self.sleeps.borrow_mut().push(time);
        if *self.hangs.borrow() {
            std::future::pending::<()>().await;
        }
        *self.now.borrow_mut() = time;
    }
}

/// What comes of a future that waits for nothing, or `None` when it does: then it is dropped.
fn poll<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn sent(outgoing: &mut OutgoingMigration, pipe: &mut Pipe) -> Option<Result<Sent, DriveError>> {
    poll(send(outgoing, pipe, &Slept::default()))
}

fn received(
    incoming: &mut IncomingMigration,
    pipe: &mut Pipe,
    back: &mut impl WriteStream,
) -> Option<Result<bool, DriveError>> {
    poll(receive(incoming, pipe, back, |_| false))
}

#[test]
fn bytes_come_over_however_they_are_cut() {
    for read_max in [0, 1, 7, 1000] {
        for spoils in [false, true] {
            let (from, to) = (large(1 << 18, "a"), Node::new((8 * 512) << 18));
            let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
            let mut pipe = Pipe::default();
            assert_eq!(sent(&mut outgoing, &mut pipe).unwrap().unwrap(), Sent::Idle);
            stop(&mut outgoing, &from);
            pipe.0.borrow_mut().spoils = spoils;
            assert_eq!(sent(&mut outgoing, &mut pipe).unwrap().unwrap(), Sent::Done);
            let total: usize = pipe.0.borrow().writes.iter().sum();
            assert_eq!(outgoing.bytes_sent(), total as u64);
            assert!(
                pipe.0
                    .borrow()
                    .writes
                    .iter()
                    .all(|&len| (1..=64 << 10).contains(&len))
            );
            pipe.0.borrow_mut().read_max = read_max;
            let mut incoming = one(&to).incoming(IncomingOptions::default());
            // QEMU's stream ends when nothing more comes.
            let more = received(&mut incoming, &mut pipe, &mut NoWayBack)
                .unwrap()
                .unwrap();
            assert!(!more);
            incoming.finish().unwrap();
            start(&mut incoming, &to);
            outgoing.finish().unwrap();
            assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
        }
    }
}

#[test]
fn it_is_asked_after_each_piece_whether_that_is_enough() {
    let from = disk(&[bitmap("a", true, false)]);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    let mut pipe = Pipe::default();
    assert_eq!(sent(&mut outgoing, &mut pipe).unwrap().unwrap(), Sent::Idle);
    pipe.0.borrow_mut().is_open = true;
    pipe.0.borrow_mut().read_max = 4;
    let to = Node::new(LEN);
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    let begun = |incoming: &IncomingMigration| {
        !incoming.bitmaps().is_empty() && incoming.is_between_parts()
    };
    let more = poll(receive(&mut incoming, &mut pipe, &mut NoWayBack, begun));
    assert!(more.unwrap().unwrap());
    assert_eq!(incoming.bitmaps()[0].state, ArrivalState::Loading);
    // It goes on from there, and waits for what is to come.
    assert!(received(&mut incoming, &mut pipe, &mut NoWayBack).is_none());
    stop(&mut outgoing, &from);
    assert_eq!(sent(&mut outgoing, &mut pipe).unwrap().unwrap(), Sent::Done);
    assert!(received(&mut incoming, &mut pipe, &mut NoWayBack).is_none());
    assert!(incoming.is_complete());
    let told: Vec<_> = std::iter::from_fn(|| incoming.poll_event()).collect();
    assert_eq!(
        told,
        [
            IncomingEvent::Started(id("d", "a")),
            IncomingEvent::Complete(id("d", "a"))
        ]
    );
}

#[test]
fn progress_is_told_for_each_bitmap() {
    let from = large(1 << 20, "a");
    let mut options = OutgoingOptions::default();
    options.mode = Mode::Live;
    options.speed = 1 << 18;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let (mut pipe, clock) = (Pipe::default(), Slept::default());
    // The speed lets no more be sent for now.
    *clock.hangs.borrow_mut() = true;
    assert!(poll(send(&mut outgoing, &mut pipe, &clock)).is_none());
    let to = Node::new(from.len());
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    let told = outgoing.bitmaps().remove(0);
    assert_eq!((told.bytes, told.is_complete), (1 << 20, false));
    assert!((1..told.bytes).contains(&told.bytes_sent), "{told:?}");
    assert_eq!(told.bytes_sent + told.bytes_left, told.bytes);
    assert_eq!(outgoing.bytes_left(), told.bytes_left);
    let more = received(&mut incoming, &mut pipe, &mut NoWayBack);
    assert!(!more.unwrap().unwrap());
    let came = incoming.bitmaps().remove(0);
    assert_eq!(
        (came.bytes, came.bytes_received, came.state),
        (told.bytes, told.bytes_sent, ArrivalState::Loading)
    );
}

#[test]
fn an_error_of_the_stream_ends_what_was_to_be_sent() {
    for hangs in [false, true] {
        for at in 1..4 {
            let from = large(1 << 17, "a");
            let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
            stop(&mut outgoing, &from);
            let mut pipe = Pipe::default();
            if hangs {
                pipe.0.borrow_mut().hangs_at = Some(at);
                assert!(sent(&mut outgoing, &mut pipe).is_none());
            } else {
                pipe.0.borrow_mut().fails_at = Some(at);
                let error = sent(&mut outgoing, &mut pipe).unwrap().unwrap_err();
                assert!(
                    matches!(error, DriveError::Io(error) if error.kind() == io::ErrorKind::BrokenPipe)
                );
            }
            // What was taken may not have been sent. To go on would leave out a chunk, and nobody would know.
            let error = sent(&mut outgoing, &mut pipe).unwrap().unwrap_err();
            assert!(
                matches!(error, DriveError::Outgoing(OutgoingError::Over)),
                "{error}"
            );
            let told = std::iter::from_fn(|| outgoing.poll_event()).last();
            assert_eq!(told, Some(OutgoingEvent::Failed(OutgoingError::Lost)));
            assert!(!from.bitmaps().query("a").unwrap().is_busy());
            let to = Node::new(from.len());
            let mut incoming = one(&to).incoming(IncomingOptions::default());
            let _ = received(&mut incoming, &mut pipe, &mut NoWayBack).unwrap();
            assert!(incoming.finish().is_err() || incoming.bitmaps().is_empty());
            assert!(to.bitmaps().query_all().is_empty());
        }
    }
}

/// The connection of a native stream hangs or fails at any call on either side, and is taken up again.
#[test]
fn a_native_stream_goes_on_after_any_call_was_dropped_or_failed() {
    let mut resumed = 0;
    for hangs in [false, true] {
        for is_forth in [false, true] {
            for at in 1..14 {
                resumed += u64::from(broken_once(hangs, is_forth, at));
            }
        }
    }
    assert!(resumed > 30, "{resumed}");
}

fn broken_once(hangs: bool, is_forth: bool, at: usize) -> bool {
    let from = disk(&[bitmap("a", true, true), bitmap("b", false, false)]);
    let to = Node::new(LEN);
    let (options, incoming) = native();
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let mut incoming = one(&to).incoming(incoming);
    stop(&mut outgoing, &from);
    let [mut forth, mut back] = [Pipe::default(), Pipe::default()];
    for pipe in [&forth, &back] {
        pipe.0.borrow_mut().is_open = true;
        pipe.0.borrow_mut().read_max = 50;
    }
    let breaks = if is_forth { &forth } else { &back };
    if hangs {
        breaks.0.borrow_mut().hangs_at = Some(at);
    } else {
        breaks.0.borrow_mut().fails_at = Some(at);
    }
    let mut has_resumed = false;
    for _ in 0..100 {
        let outcome = sent(&mut outgoing, &mut forth);
        if matches!(outcome, Some(Ok(Sent::Done))) {
            break;
        }
        let mut is_broken = match outcome {
            None => true,
            Some(Ok(Sent::Answer)) => false,
            Some(Ok(sent)) => panic!("{sent}"),
            Some(Err(DriveError::Io(_))) => true,
            Some(Err(error)) => panic!("{error}"),
        };
        let calls = |pipe: &Pipe| pipe.0.borrow().calls;
        let is_hit =
            |pipe: &Pipe| hangs && pipe.0.borrow().hangs_at.is_some_and(|at| at <= calls(pipe));
        if is_broken {
            let error = sent(&mut outgoing, &mut forth).unwrap().unwrap_err();
            assert!(
                matches!(error, DriveError::Outgoing(OutgoingError::Lost)),
                "{error}"
            );
        } else {
            is_broken |= matches!(received(&mut incoming, &mut forth, &mut back), Some(Err(_)));
            is_broken |= matches!(poll(answers(&mut outgoing, &mut back)), Some(Err(_)));
        }
        if is_broken || is_hit(&forth) || is_hit(&back) {
            for pipe in [&forth, &back] {
                let mut state = pipe.0.borrow_mut();
                (state.hangs_at, state.fails_at) = (None, None);
                state.bytes.clear();
            }
            outgoing.reconnect().unwrap();
            incoming.reconnect().unwrap();
            has_resumed = true;
            // The destination begins: it says what it has.
            assert!(received(&mut incoming, &mut forth, &mut back).is_none_or(|more| more.is_ok()));
            assert!(poll(answers(&mut outgoing, &mut back)).is_none_or(|more| more.is_ok()));
        }
    }
    outgoing.finish().unwrap();
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    for name in ["a", "b"] {
        assert_eq!(bits_of(&to, name), bits_of(&from, name));
    }
    assert!(is_stored(&to, "a") && !is_stored(&from, "a"));
    has_resumed
}

#[test]
fn an_end_amid_the_stream_is_told_as_such() {
    let from = disk(&[bitmap("a", true, false)]);
    let mut outgoing = one(&from).outgoing(OutgoingOptions::default()).unwrap();
    stop(&mut outgoing, &from);
    let mut pipe = Pipe::default();
    let _ = sent(&mut outgoing, &mut pipe).unwrap().unwrap();
    let all: Vec<u8> = pipe.0.borrow().bytes.iter().copied().collect();
    for cut in [1, all.len() / 2, all.len() - 1] {
        let mut pipe = Pipe::default();
        pipe.0.borrow_mut().bytes.extend(&all[..cut]);
        let to = Node::new(LEN);
        let mut incoming = one(&to).incoming(IncomingOptions::default());
        assert!(
            !received(&mut incoming, &mut pipe, &mut NoWayBack)
                .unwrap()
                .unwrap()
        );
        let error = incoming.finish().unwrap_err();
        let IncomingError::Stream(error) = error else {
            panic!("{error}");
        };
        assert_eq!((error.at, error.why), (cut as u64, Fault::Truncated));
    }
    // What is read may fail, too, and what is wrong with it is the destination's error.
    let mut pipe = Pipe::default();
    pipe.0.borrow_mut().fails_at = Some(1);
    let mut incoming = one(&Node::new(LEN)).incoming(IncomingOptions::default());
    let error = received(&mut incoming, &mut pipe, &mut NoWayBack)
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, DriveError::Io(_)));
    pipe.0.borrow_mut().bytes.extend([0xff; 9]);
    let error = received(&mut incoming, &mut pipe, &mut NoWayBack)
        .unwrap()
        .unwrap_err();
    assert!(matches!(
        error,
        DriveError::Incoming(IncomingError::Stream(_))
    ));
}

/// A stream that says that it has read more than there was room for.
struct Boaster;

impl ReadStream for Boaster {
    async fn read(&mut self, buf: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        (Ok(buf.len() + 1), buf)
    }
}

#[test]
fn a_stream_that_breaks_its_word_is_an_error() {
    let node = disk(&[bitmap("a", true, false)]);
    let mut incoming = one(&Node::new(LEN)).incoming(IncomingOptions::default());
    let error = poll(receive(&mut incoming, &mut Boaster, &mut NoWayBack, |_| {
        false
    }));
    let is_it = |error: DriveError| matches!(error, DriveError::Io(error) if error.kind() == io::ErrorKind::InvalidData);
    assert!(is_it(error.unwrap().unwrap_err()));
    let mut outgoing = one(&node).outgoing(native().0).unwrap();
    assert!(is_it(
        poll(answers(&mut outgoing, &mut Boaster))
            .unwrap()
            .unwrap_err()
    ));
}

#[test]
fn the_speed_is_that_of_the_callers_clock_and_a_sleep_may_be_dropped() {
    let from = large(2 << 20, "a");
    let mut options = OutgoingOptions::default();
    options.mode = Mode::Live;
    options.speed = 1 << 20;
    let mut outgoing = one(&from).outgoing(options).unwrap();
    let (mut pipe, clock) = (Pipe::default(), Slept::default());
    // Every sleep is dropped, and nothing is lost by that.
    *clock.hangs.borrow_mut() = true;
    let mut drops = 0;
    loop {
        match poll(send(&mut outgoing, &mut pipe, &clock)) {
            None => {
                drops += 1;
                let until = *clock.sleeps.borrow().last().unwrap();
                assert!(until > clock.now());
                *clock.now.borrow_mut() = until;
            }
            Some(sent) => {
                assert_eq!(sent.unwrap(), Sent::Idle);
                break;
            }
        }
    }
    assert!(drops > 5, "{drops}");
    let rate = outgoing.bytes_sent() as f64 / clock.now().as_secs_f64();
    assert!((0.8..1.3).contains(&(rate / f64::from(1 << 20))), "{rate}");
    // At every moment no more was sent than the speed allows, but for what is sent at once.
    write(&from, 512);
    let slept = clock.sleeps.borrow().len();
    stop(&mut outgoing, &from);
    assert_eq!(
        poll(send(&mut outgoing, &mut pipe, &clock))
            .unwrap()
            .unwrap(),
        Sent::Done
    );
    assert_eq!(
        clock.sleeps.borrow().len(),
        slept,
        "no guest runs, so there is no limit"
    );
    let to = Node::new(from.len());
    let mut incoming = one(&to).incoming(IncomingOptions::default());
    assert!(
        !received(&mut incoming, &mut pipe, &mut NoWayBack)
            .unwrap()
            .unwrap()
    );
    incoming.finish().unwrap();
    start(&mut incoming, &to);
    outgoing.finish().unwrap();
    assert_eq!(bits_of(&to, "a"), bits_of(&from, "a"));
}
