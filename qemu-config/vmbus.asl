/*
 * ACPI device by which a guest finds VMBus. Compile with: iasl -f -p vmbus vmbus.asl
 * (-f is needed because the hardware id has five characters, which the compiler reports as an error).
 */
DefinitionBlock ("", "SSDT", 2, "VMBHST", "VMBUSDEV", 0x00000001)
{
    Scope (\_SB)
    {
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
