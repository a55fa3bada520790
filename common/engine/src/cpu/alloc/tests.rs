use super::*;

#[test]
fn memory_is_zeroed_aligned_and_writable() {
    for len in [1, 1000, 3 << 20] {
        let private = Aligned::<u32>::zeroed(len).unwrap();
        let shared = Aligned::<u32>::shared(len).unwrap();
        assert_eq!((private.file().is_some(), shared.file().is_some()), (false, true));
        for mut numbers in [private, shared] {
            assert_eq!((numbers.len(), numbers.as_ptr() as usize % 64), (len, 0));
            assert!(numbers.as_slice().iter().all(|&x| x == 0));
            numbers.as_mut_slice()[len - 1] = 7;
            assert_eq!(numbers.as_slice()[len - 1], 7);
        }
    }
    assert!(Aligned::<u32>::zeroed(0).unwrap().as_slice().is_empty());
}

#[test]
fn absurd_sizes_are_refused() {
    for len in [usize::MAX, usize::MAX / 2, usize::MAX / 8] {
        assert!(Aligned::<u32>::zeroed(len).is_err());
        assert!(Aligned::<u32>::shared(len).is_err());
    }
}
