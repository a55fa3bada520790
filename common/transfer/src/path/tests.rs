use super::*;

const SLOW: SlowPath = SlowPath {
    ratio: 0.25,
    refuse: true,
};
const GB: f64 = 1e9;

fn measured(bytes_per_s: f64) -> Option<Measured> {
    Some(Measured {
        bytes_per_s,
        latency: Duration::from_millis(1),
    })
}

#[test]
fn a_prediction_counts_latency_and_follows_what_transfers_achieve() {
    let mut path = Path::new(Transport::Grpc, measured(4.0 * GB));
    // 4 MB in 1 ms, and 1 ms of latency.
    assert!((path.predicted(4_000_000) - 2.0 * GB).abs() < 1.0);
    let before = path.predicted(1 << 30);
    for _ in 0..50 {
        assert!(!path.transferred(64 << 20, 2.0 * GB, &SLOW));
    }
    let after = path.predicted(1 << 30);
    assert!(after < 0.55 * before && after > 0.45 * before, "{before} then {after}");
    assert_eq!(Path::new(Transport::Grpc, None).predicted(1 << 30), 0.0);
}

#[test]
fn a_slow_transfer_raises_doubt_and_a_probe_settles_it() {
    let fresh = || Path::new(Transport::Grpc, measured(4.0 * GB));
    let mut path = fresh();
    assert!(!path.transferred(limits::TELLING_BYTES, 1.1 * GB, &SLOW));
    assert!(
        !path.transferred(limits::TELLING_BYTES - 1, 0.1 * GB, &SLOW),
        "too short to tell"
    );
    assert_eq!(path.state(), PathState::Good);
    assert!(path.transferred(limits::TELLING_BYTES, 0.9 * GB, &SLOW));
    assert_eq!(path.state(), PathState::Doubtful);

    let mut busy = path;
    busy.probed(measured(3.0 * GB), &SLOW);
    assert_eq!(busy, Path::new(Transport::Grpc, measured(3.0 * GB)));

    for again in [measured(0.9 * GB), None] {
        let mut bad = path;
        bad.probed(again, &SLOW);
        assert_eq!(bad.state(), PathState::Bad);
        assert_eq!(bad.probe(), path.probe(), "it is still compared with what it was");
        bad.probed(measured(4.0 * GB), &SLOW);
        assert_eq!(bad, fresh());
    }
    let mut unknown = Path::new(Transport::Grpc, None);
    assert!(!unknown.transferred(1 << 30, 1.0, &SLOW));
    unknown.probed(None, &SLOW);
    assert_eq!(unknown.state(), PathState::Good);
}

#[test]
fn the_best_path_that_may_be_taken_is() {
    let grpc = Path::new(Transport::Grpc, measured(4.0 * GB));
    let shm = Path::new(Transport::Shm, measured(12.0 * GB));
    let bad = |mut path: Path| {
        path.probed(None, &SLOW);
        path
    };
    let warn = SlowPath { refuse: false, ..SLOW };
    let (auto, only) = (Preference::Auto, Preference::Only);
    let check = |paths: &[Path], preference, slow: &SlowPath, expected: Result<Transport, &str>| {
        let chosen = choose(paths, preference, slow, |_| "no reason".to_owned());
        let seen = match &chosen {
            Ok(path) => Ok(path.transport()),
            Err(PathError::Unavailable { .. }) => Err("unavailable"),
            Err(PathError::Slow { .. }) => Err("slow"),
        };
        assert_eq!(seen, expected, "{paths:?} {preference} {slow:?}");
    };
    check(&[grpc, shm], auto, &SLOW, Ok(Transport::Shm));
    check(&[grpc, shm], only(Transport::Grpc), &SLOW, Ok(Transport::Grpc));
    check(&[grpc], only(Transport::Shm), &SLOW, Err("unavailable"));
    check(&[grpc, bad(shm)], auto, &SLOW, Ok(Transport::Grpc));
    check(&[grpc, bad(shm)], only(Transport::Shm), &SLOW, Err("slow"));
    check(&[bad(grpc), bad(shm)], auto, &SLOW, Err("slow"));
    check(&[bad(grpc), bad(shm)], auto, &warn, Ok(Transport::Shm));
    check(&[Path::new(Transport::Grpc, None)], auto, &SLOW, Ok(Transport::Grpc));
}

#[test]
fn names_read_as_written() {
    for name in ["auto", "grpc", "shm"] {
        assert_eq!(
            name.parse::<Preference>()
                .map(|preference| preference.to_string())
                .as_deref(),
            Ok(name)
        );
    }
    assert_eq!("tcp".parse::<Preference>(), Err(PreferenceError));
}
