use super::*;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn present(attendance: &Attendance) -> Vec<usize> {
    attendance.present().collect()
}

/// After one step of all threads that took 12 ms.
fn check(waited_ms: &[u64], expected: &[usize]) {
    let mut attendance = Attendance::new(waited_ms.len());
    attendance.judge(ms(12), |thread| ms(waited_ms[thread]));
    assert_eq!(present(&attendance), expected, "{waited_ms:?}");
}

#[test]
fn who_costs_more_than_it_adds_stands_aside() {
    check(&[0, 0], &[0, 1]);
    check(&[0, 6], &[0, 1]);
    check(&[0, 7], &[0]);
    check(&[0, 0, 4], &[0, 1, 2]);
    check(&[0, 5, 0], &[0, 2]);
}

#[test]
fn one_leaves_at_a_time() {
    check(&[0, 5, 6], &[0, 1]);
}

#[test]
fn the_caller_stays_and_another_makes_room() {
    check(&[7, 0], &[0]);
    check(&[5, 0, 0], &[0, 1]);
    check(&[12], &[0]);
}

#[test]
fn it_is_tried_again_ever_later_up_to_a_bound() {
    let mut attendance = Attendance::new(2);
    let mut times = Vec::new();
    for _ in 0..12 {
        attendance.judge(ms(6), |thread| ms([0, 4][thread]));
        let mut aside = 0;
        while present(&attendance) == [0] {
            attendance.judge(ms(1), |_| ms(0));
            aside += 1;
        }
        times.push(aside);
    }
    assert_eq!(times[..4], [8, 24, 56, 120]);
    assert_eq!(times[11], LONGEST.as_millis());
    assert!(times.is_sorted());
}

#[test]
fn trust_comes_back_with_time() {
    let mut attendance = Attendance::new(2);
    for _ in 0..12 {
        attendance.judge(ms(6), |thread| ms([0, 4][thread]));
        attendance.pass(LONGEST);
    }
    attendance.pass(LONGEST);
    attendance.judge(ms(6), |thread| ms([0, 4][thread]));
    attendance.pass(ms(7));
    assert_eq!(present(&attendance), [0]);
    attendance.pass(ms(1));
    assert_eq!(present(&attendance), [0, 1]);
}
