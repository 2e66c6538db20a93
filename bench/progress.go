package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// printCells prints what all libraries did under one load, as soon as it is known.
func printCells(out io.Writer, load Load, cells []Cell) error {
	metrics := load.metrics()
	var text strings.Builder
	fmt.Fprintf(&text, "\n%v\n", load)
	for _, m := range metrics {
		text.WriteString("\t" + m.name)
	}
	text.WriteString("\t\n")
	for _, c := range cells {
		text.WriteString(c.Library)
		if why := c.Failure(); why != "" {
			text.WriteString("\t" + why + "\t\n")
			continue
		}
		for _, m := range metrics {
			text.WriteString("\t" + c.text(m, true))
		}
		text.WriteString("\t\n")
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	if _, err := io.WriteString(table, text.String()); err != nil {
		return err
	}
	return table.Flush()
}
