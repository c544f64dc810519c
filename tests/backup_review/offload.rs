//! Copies that the target makes by itself.

use super::*;

/// What the target makes by itself is in its way like anything else.
#[test]
fn while_a_guest_waits_less_is_offloaded_at_the_same_time() {
    for offload in [true, false] {
        let mut rig = Rig::started(64 * CLUSTER, |parts| {
            parts.options.chunk_max = CLUSTER;
            parts.options.workers = 8;
            parts.options.offload = offload;
            parts.target.copies_from_source = true;
        });
        let is_copy = |kind| matches!(kind, OpKind::CopyOffloaded(_) | OpKind::Copy(_));
        let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
        let count = |rig: &Rig| rig.out.iter().filter(|op| is_copy(op.kind())).count();
        assert_eq!(count(&rig), 8);
        let _guest = rig.write(cluster(60));
        let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
        assert_eq!(count(&rig), 9, "one of them for the guest");
        // The target is slow: so nothing follows until half of it is done.
        for left in (5..9).rev() {
            rig.now += Duration::from_millis(20);
            let done = rig
                .out
                .iter()
                .position(|op| !op.is_urgent() && is_copy(op.kind()));
            let op = rig.out.remove(done.unwrap());
            rig.backup.op_done(rig.now, op, Outcome::Done);
            let _ = rig.answer_all(|kind| matches!(kind, OpKind::Status(_)));
            assert_eq!(count(&rig), left, "offload {offload}");
        }
    }
}
