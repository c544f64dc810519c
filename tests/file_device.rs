//! The device and the clock that examples, tests and benches run on keep their promises.
#![allow(missing_docs, reason = "a test")]

#[path = "../examples/support/mod.rs"]
mod support;

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blockjob::driver::{Clock, Driven, Driver};
use blockjob::io::{AlignedBuf, BlockDevice, BufResult, ReadAt, WriteAt};
use blockjob::{
    ByteRange, CompareBy, Content, Event, Granularity, Limits, Mirror, MirrorOptions, Node, Status,
    Unmap, Verified,
};
use support::clock::{TimerClock, block_on};
use support::file::FileDevice;

const LEN: u64 = (1 << 20) + 513;

/// An open file without a name, so that nothing is left behind whatever happens.
fn file(len: u64) -> File {
    let path = std::env::temp_dir().join(format!(
        "blockjob-file-device-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(len).unwrap();
    file
}

fn device() -> FileDevice {
    FileDevice::new(file(LEN), 2).unwrap()
}

fn buf(len: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::new(len, 1).unwrap();
    buf.as_mut().fill(byte);
    buf
}

#[test]
fn reads_what_was_written_up_to_the_unaligned_end() {
    let device = device();
    block_on(async {
        let (written, _) = device.write_at(LEN - 1000, buf(1000, 7)).await;
        written.unwrap();
        let (read, back) = device.read_at(LEN - 1001, buf(1001, 1)).await;
        read.unwrap();
        assert_eq!(back.as_ref()[0], 0);
        assert!(back.as_ref()[1..].iter().all(|&byte| byte == 7));
        let (past_the_end, _) = device.read_at(LEN - 1, buf(2, 1)).await;
        assert_eq!(
            past_the_end.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        device.flush().await.unwrap();
    });
}

#[test]
fn tells_data_from_holes_and_zeroes_both_ways() {
    let device = device();
    block_on(async {
        device
            .write_at(256 << 10, buf(64 << 10, 7))
            .await
            .0
            .unwrap();
        let hole = device.block_status((0..LEN).into()).await.unwrap();
        assert_eq!((hole.content, hole.len), (Content::Zero, 256 << 10));
        let data = device.block_status((256 << 10..LEN).into()).await.unwrap();
        assert_eq!((data.content, data.len), (Content::Data, 64 << 10));
        let rest = device.block_status((320 << 10..LEN).into()).await.unwrap();
        assert_eq!((rest.content, rest.len), (Content::Zero, LEN - (320 << 10)));

        for unmap in [Unmap::Allowed, Unmap::Forbidden] {
            device.write_at(0, buf(10_000, 7)).await.0.unwrap();
            device.write_zeroes((1..9_999).into(), unmap).await.unwrap();
            let (read, back) = device.read_at(0, buf(10_000, 1)).await;
            read.unwrap();
            assert_eq!((back.as_ref()[0], back.as_ref()[9_999]), (7, 7));
            assert!(back.as_ref()[1..9_999].iter().all(|&byte| byte == 0));
        }
        device.discard((0..LEN).into()).await.unwrap();
        let nothing = device.block_status((0..LEN).into()).await.unwrap();
        assert_eq!((nothing.content, nothing.len), (Content::Zero, LEN));
        assert_eq!(device.file().metadata().unwrap().len(), LEN);
    });
}

#[test]
fn settle_waits_for_writes_whose_futures_were_dropped() {
    let device = device();
    for round in 1..=50u8 {
        for block in 0..16 {
            let write = pin!(device.write_at(block << 16, buf(64 << 10, round)));
            let _ = write.poll(&mut Context::from_waker(Waker::noop()));
        }
        block_on(device.settle());
        let mut byte = [0];
        for block in 0..16 {
            device
                .file()
                .read_exact_at(&mut byte, (block << 16) + 65_535)
                .unwrap();
            assert_eq!(byte[0], round);
        }
    }
}

#[test]
fn dropping_the_device_finishes_what_was_asked_for() {
    let device = device();
    let file = device.file().try_clone().unwrap();
    {
        let write = pin!(device.write_at(0, buf(1 << 20, 9)));
        let _ = write.poll(&mut Context::from_waker(Waker::noop()));
    }
    drop(device);
    let mut last = [0];
    file.read_exact_at(&mut last, (1 << 20) - 1).unwrap();
    assert_eq!(last[0], 9);
}

#[test]
fn a_request_that_panics_panics_where_it_is_awaited_and_the_device_lives_on() {
    let device = device();
    let quiet = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        block_on(device.call(|_| -> () { std::panic::resume_unwind(Box::new("on purpose")) }));
    }));
    assert_eq!(quiet.unwrap_err().downcast_ref(), Some(&"on purpose"));
    block_on(async {
        device.settle().await;
        device.write_at(0, buf(10, 1)).await.0.unwrap();
    });
}

#[test]
fn only_a_regular_file_is_a_device() {
    let error = FileDevice::new(File::open("/dev/null").unwrap(), 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_sleeper_is_woken_in_time_order_and_never_early() {
    let clock = TimerClock::new();
    let start = clock.now();
    let at = |millis| start + Duration::from_millis(millis);
    let mut order = Vec::new();
    block_on(async {
        let mut late = pin!(clock.sleep_until(at(40)));
        let mut early = pin!(clock.sleep_until(at(10)));
        // A sleeper that gives up takes its alarm with it.
        let _ = pin!(clock.sleep_until(at(1))).poll(&mut Context::from_waker(Waker::noop()));
        let mut done = [false; 2];
        std::future::poll_fn(|cx| {
            for (index, sleeper) in [early.as_mut(), late.as_mut()].into_iter().enumerate() {
                if !done[index] && sleeper.poll(cx).is_ready() {
                    done[index] = true;
                    order.push((index, clock.now()));
                }
            }
            if done == [true; 2] {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    });
    assert!(order[0].0 == 0 && order[0].1 >= at(10));
    assert!(order[1].0 == 1 && order[1].1 >= at(40));
}

#[test]
fn a_driver_over_files_can_be_sent_to_another_thread() {
    fn sent<F: Future + Send>(future: F) -> F {
        future
    }
    let (source, target, clock) = (device(), device(), TimerClock::new());
    block_on(source.write_at(0, buf(1 << 20, 3))).0.unwrap();
    let node = Node::new(LEN);
    let mut mirror = Mirror::new(
        &node,
        source.limits(),
        target.limits(),
        MirrorOptions::default(),
    )
    .unwrap();
    let job = mirror.job().clone();
    job.start().unwrap();
    let driver = Driver::new(&source, &target, &clock);
    let complete_when_ready = async {
        while job.query().status != Status::Ready {
            clock
                .sleep_until(clock.now() + Duration::from_millis(1))
                .await;
        }
        job.complete().unwrap();
    };
    std::thread::scope(|scope| {
        let run = sent(async {
            loop {
                match driver.run(&mut mirror).await {
                    Driven::Switch(switch) => switch.commit(),
                    Driven::SwitchBack(_) => unreachable!("it is in no group"),
                    Driven::Done(result) => break result,
                }
            }
        });
        let driving = scope.spawn(move || block_on(run));
        block_on(complete_when_ready);
        driving.join().unwrap().unwrap();
    });
    block_on(async {
        let (read, back) = target.read_at(0, buf(LEN as usize, 1)).await;
        read.unwrap();
        assert!(back.as_ref()[..1 << 20].iter().all(|&byte| byte == 3));
        assert!(back.as_ref()[1 << 20..].iter().all(|&byte| byte == 0));
    });
}

/// A file whose content is compared where it is.
struct Comparing(FileDevice);

impl BlockDevice for Comparing {
    type Buf = AlignedBuf;
    fn limits(&self) -> Limits {
        let mut limits = self.0.limits();
        limits.compare = Some(CompareBy::Device);
        limits
    }
}

impl WriteAt for Comparing {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.0.write_at(offset, buf).await
    }
    async fn compare_at(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> (io::Result<Vec<ByteRange>>, AlignedBuf) {
        let mut held = vec![0; buf.as_ref().len()];
        let read = self.0.file().read_exact_at(&mut held, offset);
        let range = ByteRange::at(offset, held.len() as u64).unwrap();
        let differs = held != buf.as_ref();
        (
            read.map(|()| differs.then_some(range).into_iter().collect()),
            buf,
        )
    }
    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        self.0.write_zeroes(range, unmap).await
    }
    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.0.discard(range).await
    }
    async fn flush(&self) -> io::Result<()> {
        self.0.flush().await
    }
    async fn settle(&self) {
        self.0.settle().await;
    }
}

/// The bytes of granules that were told to differ.
fn verify<T: WriteAt<Buf = AlignedBuf>>(source: &FileDevice, target: &T, file: &File) -> u64 {
    let node = Node::new(LEN);
    let mut options = MirrorOptions::default();
    options.job.id = Some("m".to_owned());
    options.granularity = Granularity::from_bytes(4096);
    options.chunk_max = 64 << 10;
    let mut mirror = Mirror::new(&node, source.limits(), target.limits(), options).unwrap();
    let job = mirror.job().clone();
    job.start().unwrap();
    let driver = Driver::new(source, target, TimerClock::new());
    let mut told = 0;
    block_on(async {
        let mut run = pin!(driver.run(&mut mirror));
        std::future::poll_fn(|cx| {
            loop {
                let polled = run.as_mut().poll(cx);
                assert!(polled.is_pending(), "nobody has asked for the end");
                match job.poll_event(cx.waker()) {
                    Poll::Ready(Event::Ready { .. }) => {
                        file.write_all_at(&[0x55], 300_000).unwrap();
                        file.write_all_at(&[0x55], LEN - 1).unwrap();
                        job.verify().unwrap();
                    }
                    Poll::Ready(Event::Differs(found)) => told += found.bytes,
                    Poll::Ready(Event::Verified(found)) => {
                        assert_eq!((found.state, found.differing), (Verified::Whole, told));
                        return Poll::Ready(());
                    }
                    Poll::Ready(_) => {}
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
    });
    job.complete().unwrap();
    block_on(async {
        let Driven::Switch(switch) = driver.run(&mut mirror).await else {
            panic!("it has failed");
        };
        switch.commit();
    });
    told
}

#[test]
fn a_verification_finds_damage_and_mends_it() {
    let source = device();
    block_on(async {
        source.write_at(200_000, buf(400_000, 7)).await.0.unwrap();
    });
    let content = |file: &File| {
        let mut bytes = vec![0; LEN as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    // By reading it is told in granules: one of 4 KiB, and the last one, which is short.
    let target = device();
    let damaged = target.file().try_clone().unwrap();
    assert_eq!(verify(&source, &target, &damaged), 4096 + 513);
    assert!(content(source.file()) == content(target.file()));
    // This device says only that something of a copy differs.
    let target = Comparing(device());
    let damaged = target.0.file().try_clone().unwrap();
    assert_eq!(verify(&source, &target, &damaged), (64 << 10) + 513);
    assert!(content(source.file()) == content(target.0.file()));
}
