//! Views: accepted exactly if the slice holds what the extents say.

use crate::{EXTENTS, edges, survives};
use trn_kernels::{HeadsMut, HeadsRef, MatMut, MatRef};

/// Elements that `rows` rows of `cols`, `stride` apart, reach over; `None` if rows overlap.
fn reach(rows: usize, cols: usize, stride: usize) -> Option<u128> {
    match (rows, cols) {
        (0, _) | (_, 0) => Some(0),
        _ if rows > 1 && stride < cols => None,
        _ => Some((rows as u128 - 1) * stride as u128 + cols as u128),
    }
}

#[test]
fn matrices() {
    let mut data = [0u8; 64];
    for rows in EXTENTS {
        for cols in EXTENTS {
            for len in [0, 1, 64] {
                let slice = &data[..len];
                let view = survives(format_args!("MatRef::new of {rows} x {cols}"), || MatRef::new(slice, rows, cols));
                assert_eq!(view.is_ok(), rows as u128 * cols as u128 == len as u128, "{rows} x {cols} of {len}");
                assert_eq!(MatMut::new(&mut data[..len], rows, cols).is_ok(), view_fits(rows, cols, len));
                if let Ok(view) = MatRef::new(&data[..len], rows, cols) {
                    matrix(view);
                }
                for stride in EXTENTS {
                    let name = format_args!("MatRef::with_stride of {rows} x {cols} by {stride}");
                    let fits = reach(rows, cols, stride).is_some_and(|n| n <= len as u128);
                    let view = survives(name, || MatRef::with_stride(&data[..len], rows, cols, stride));
                    assert_eq!(view.is_ok(), fits, "{name}");
                    if let Ok(view) = view {
                        matrix(view);
                    }
                    let mut view = survives(name, || MatMut::with_stride(&mut data[..len], rows, cols, stride));
                    assert_eq!(view.is_ok(), fits, "{name}");
                    if let Ok(view) = &mut view {
                        for i in edges(rows) {
                            let got = survives(name, || view.reborrow().row_mut(i).map(|row| row.len()));
                            assert_eq!(got, (i < rows).then_some(cols), "{name}");
                        }
                        matrix(view.as_ref());
                    }
                }
            }
        }
    }
}

fn view_fits(rows: usize, cols: usize, len: usize) -> bool {
    rows as u128 * cols as u128 == len as u128
}

fn matrix(view: MatRef<'_, u8>) {
    let (rows, cols) = (view.rows(), view.cols());
    for i in edges(rows) {
        let row = survives(format_args!("MatRef::row({i}) of {rows} x {cols}"), || view.row(i));
        assert_eq!(row.map(<[u8]>::len), (i < rows).then_some(cols));
        for count in edges(rows) {
            let name = format_args!("MatRef::rows_at({i}, {count}) of {rows} x {cols}");
            let part = survives(name, || view.rows_at(i, count));
            assert_eq!(part.is_ok(), i as u128 + count as u128 <= rows as u128, "{name}");
            match part {
                Ok(part) => {
                    assert_eq!((part.rows(), part.row(0)), (count, if count == 0 { None } else { view.row(i) }))
                }
                Err(e) => assert!(!e.to_string().contains("index -"), "{name}: {e}"),
            }
        }
    }
}

#[test]
fn heads() {
    let mut data = [0u8; 64];
    for tokens in EXTENTS {
        for heads in EXTENTS {
            for head_dim in EXTENTS {
                let row = heads as u128 * head_dim as u128;
                for len in [0, 1, 64] {
                    let name = format_args!("heads [{tokens}, {heads}, {head_dim}] of {len}");
                    let view = survives(name, || HeadsRef::new(&data[..len], tokens, heads, head_dim));
                    // Heads that overflow by themselves are refused even for no token.
                    let row = usize::try_from(row).ok();
                    let fits = row.is_some_and(|row| view_fits(tokens, row, len));
                    assert_eq!(view.is_ok(), fits, "{name}");
                    for stride in [0, 1, 31, 64, usize::MAX / 2, usize::MAX] {
                        let fits = row.and_then(|row| reach(tokens, row, stride)).is_some_and(|n| n <= len as u128);
                        let view =
                            survives(name, || HeadsRef::with_stride(&data[..len], tokens, heads, head_dim, stride));
                        assert_eq!(view.is_ok(), fits, "{name} by {stride}");
                        let mut view =
                            survives(name, || HeadsMut::with_stride(&mut data[..len], tokens, heads, head_dim, stride));
                        let Ok(view) = &mut view else { continue };
                        for (t, h) in edges(tokens).into_iter().zip(edges(heads).into_iter().rev()) {
                            let inside = (t < tokens && h < heads).then_some(head_dim);
                            assert_eq!(survives(name, || view.head(t, h).map(<[u8]>::len)), inside, "{name}");
                            let got = survives(name, || view.reborrow().head_mut(t, h).map(|x| x.len()));
                            assert_eq!(got, inside, "{name}");
                        }
                    }
                }
            }
        }
    }
}

/// Elements of no size: a slice of them can be as long as `usize` counts.
#[test]
fn views_of_nothing() {
    let data = [(); usize::MAX];
    let m = MatRef::new(&data[..], usize::MAX, 1).unwrap();
    assert_eq!(survives(format_args!("row"), || m.row(usize::MAX - 1)), Some(&[()][..]));
    let m = survives(format_args!("rows_at"), || m.rows_at(usize::MAX - 1, 1)).unwrap();
    assert_eq!(m.rows(), 1);
    let heads = HeadsRef::new(&data[..], 1, usize::MAX, 1).unwrap();
    assert_eq!(survives(format_args!("head"), || heads.head(0, usize::MAX - 1)), Some(&[()][..]));
    assert!(MatRef::new(&data[..], 2, usize::MAX).is_err());
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_views() {
    use ndarray::{Array2, Array3, Axis};
    let mut a = Array2::<f32>::zeros((usize::MAX / 8, 0));
    let view = survives(format_args!("MatRef::try_from"), || MatRef::try_from(a.view())).unwrap();
    assert_eq!((view.rows(), view.cols()), (usize::MAX / 8, 0));
    assert!(survives(format_args!("MatMut::try_from"), || MatMut::try_from(a.view_mut())).is_ok());
    let mut a = Array2::<f32>::zeros((3, 4));
    assert!(survives(format_args!("MatRef::try_from"), || MatRef::try_from(a.t())).is_err());
    a.invert_axis(Axis(0));
    assert!(survives(format_args!("MatMut::try_from"), || MatMut::try_from(a.view_mut())).is_err());
    let mut h = Array3::<f32>::zeros((0, usize::MAX / 8, 1));
    assert!(survives(format_args!("HeadsRef::try_from"), || HeadsRef::try_from(h.view())).is_ok());
    assert!(survives(format_args!("HeadsMut::try_from"), || HeadsMut::try_from(h.view_mut())).is_ok());
}
