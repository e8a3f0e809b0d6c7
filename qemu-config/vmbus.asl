/*
 * ACPI devices by which a guest finds VMBus and memory windows for its devices. Compile with:
 * iasl -f -p vmbus vmbus.asl
 * (-f is needed because the hardware id has five characters, which the compiler reports as an error).
 *
 * The windows lie where neither pc nor q35 has anything: below the local APICs' last page, and at 832 GiB, beyond
 * RAM and 64-bit PCI windows and below the 1 TiB that TCG's processors address.
 */
DefinitionBlock ("", "SSDT", 2, "VMBHST", "VMBUSDEV", 0x00000002)
{
    Scope (\_SB)
    {
        Device (VMOD)
        {
            Name (_HID, "ACPI0004")
            Name (_UID, Zero)
            Name (_CRS, ResourceTemplate ()
            {
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x00000000, 0xFEF00000, 0xFEF7FFFF, 0x00000000, 0x00080000)
                QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x0000000000000000, 0x000000D000000000, 0x000000D0FFFFFFFF, 0x0000000000000000,
                    0x0000000100000000)
            })
            Device (VMBS)
            {
                Name (_HID, "VMBus")
                Name (_UID, Zero)
                Name (_DDN, "VMBUS")
                Name (_STA, 0x0F)
                Name (_CRS, ResourceTemplate () {})
            }
        }
    }
}
