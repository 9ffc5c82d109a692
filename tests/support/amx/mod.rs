//! AMX for machines that have none: a handler of SIGILL that executes its instructions, as the Intel SDM (vol. 2) and docs/numerics.md
//! section 2 say what they do. A test that calls [`available`] first runs the AMX tier's own code everywhere that AVX-512 is.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod machine;

use libc::{REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
use libc::{REG_RAX, REG_RBP, REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RIP, REG_RSI, REG_RSP};
use machine::{Instruction, Operation};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use trn_kernels::Isa;

static PRODUCTS: AtomicU64 = AtomicU64::new(0);

/// TDPBF16PS executed so far, if it is this emulator that does.
#[allow(dead_code)] // not every test counts
pub(crate) fn products() -> Option<u64> {
    let products = PRODUCTS.load(Relaxed);
    (products > 0).then_some(products)
}

/// Makes the AMX tier available: by the machine, or by this emulator. `false` where AVX-512 is missing too.
pub(crate) fn available() -> bool {
    static INSTALLED: Once = Once::new();
    if !Isa::Amx.available() && Isa::Avx512.available() {
        INSTALLED.call_once(install);
    }
    Isa::Amx.available()
}

fn install() {
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigill;
    // SAFETY: a sigaction is integers and a mask; all zeros are one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    (action.sa_sigaction, action.sa_flags) = (handler as usize, libc::SA_SIGINFO);
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does what may be done for a synchronous fault.
    let installed = unsafe { libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) };
    assert_eq!(installed, 0);
    // SAFETY: from now on AMX's instructions do what they do on a machine that has them.
    unsafe { trn_kernels::cpu::assume_amx() };
}

/// Registers by their number in an instruction.
const REGISTERS: [i32; 16] = [
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12,
    REG_R13, REG_R14, REG_R15,
];

extern "C" fn on_sigill(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid context to a handler with SA_SIGINFO.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // SAFETY: the instruction pointer is at code that was just fetched; at most 15 bytes belong to the instruction, and no AMX
    // instruction ends the program's text.
    let code = unsafe { std::slice::from_raw_parts(registers[REG_RIP as usize] as *const u8, 15) };
    let value = |number: u8| registers[REGISTERS[usize::from(number)] as usize] as u64;
    let Some((instruction, length)) = Instruction::decode(code, value) else {
        // Not ours: the same fault again, with the default action.
        // SAFETY: a signal number and a constant.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        return;
    };
    // SAFETY: the addresses are those that the program gave to an instruction that would access them.
    if let Err(why) = unsafe { machine::execute(instruction) } {
        eprintln!("AMX emulator: {why}");
        std::process::abort();
    }
    if instruction.operation == Operation::Product {
        PRODUCTS.fetch_add(1, Relaxed);
    }
    registers[REG_RIP as usize] += length as i64;
}
