package main

import (
	"bytes"
	"image/color"
	"math"
	"slices"
	"strconv"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A chart has rows of panels. Each panel shows what the libraries did under one load, with a bar for each.
type chart struct {
	file   string
	title  string
	rows   []chartRow
	colour map[string]color.Color // by library
}

// A chartRow has panels beside each other, with the names of the libraries to their left.
type chartRow struct {
	title  string
	names  []string
	panels []panel
}

// A panel has an axis of its own.
type panel struct {
	title string
	unit  string
	log   bool
	least float64 // that the scale must show
	most  float64
	bars  []bar
}

// A bar is what a library did.
type bar struct {
	library string
	absent  bool   // It has no part in this.
	figure  Figure // without repetitions: nothing to draw
	label   string
	starved bool // Some waiter got nothing.
}

// chartsOf returns all charts. Those are empty whose loads were not measured.
func chartsOf(r Results) []chart {
	crowds := []Load{contend(0, 2, 2, 0), contend(0, 16, 4, 0), contend(0, 128, 4, 0), contend(0, 1000, 4, 0)}
	pairs := []Load{handover(0, 2), handover(0, 1)}
	rate, commands, latency := metricsOf(Contend)[0], metricsOf(Contend)[1], metricsOf(Handover)[0]

	afar := r.panels("ms", latency, handover(networkMS, 2))
	afar = append(logarithmic(afar), r.panels("sections/s", rate, contend(networkMS, 16, 4, 0))...)
	afar[0].title = "release to next holder, median: less is better"
	afar[1].title = "16 waiters in 4 processes: more is better"

	charts := []chart{
		{file: "cycles.svg", title: "Uncontended: each goroutine acquires and releases an id of its own", rows: []chartRow{
			row("cycles a second: more is better", r.panels("cycles/s", rate, cycles(0, 1, 16, 256, 1024)...)),
		}},
		{file: "handover.svg", title: "From the release to the next holder", rows: []chartRow{
			row("median time, on a logarithmic scale: less is better", logarithmic(alike(r.panels("ms", latency, pairs...)))),
		}},
		{file: "contended.svg", title: "Contended: all waiters on one id, in 4 processes (2 waiters in 2), empty sections", rows: []chartRow{
			row("sections a second: more is better", alike(r.panels("sections/s", rate, crowds...))),
		}},
		{file: "commands.svg", title: "Contended: what a section costs the server, in the same runs", rows: []chartRow{
			row("commands for each section, on a logarithmic scale: less is better", logarithmic(alike(r.panels("commands", commands, crowds...)))),
		}},
		{file: "network.svg", title: "Over a network with a round trip of 1 ms", rows: []chartRow{
			row("uncontended, cycles a second: more is better", r.panels("cycles/s", rate, cycles(networkMS, 1, 16, 256, 1024)...)),
			row("on one id; the scale of times is logarithmic", afar),
		}},
	}
	for i := range charts {
		charts[i].colour = colours(r.Libraries)
		charts[i].rows = slices.DeleteFunc(charts[i].rows, func(r chartRow) bool { return len(r.panels) == 0 })
	}
	return charts
}

// panels returns a panel for each load.
func (r Results) panels(unit string, m metric, loads ...Load) []panel {
	var panels []panel
	for _, load := range loads {
		p := panel{title: load.panelTitle(), unit: unit, least: math.Inf(1)}
		for _, l := range r.Libraries {
			cell, ok := r.Cell(load, l.Name)
			b := bar{library: l.Name, absent: !ok, label: cell.text(m, false)}
			switch {
			case cell.counts():
				b.figure, b.starved = cell.Figure(m.of), cell.mark() != ""
				p.least, p.most = min(p.least, b.figure.Min), max(p.most, b.figure.Max)
			case len(cell.Runs) == 0:
				b.label = "not measured"
			}
			p.bars = append(p.bars, b)
		}
		panels = append(panels, p)
	}
	return panels
}

// panelTitle is short.
func (l Load) panelTitle() string {
	if l.Workload == Contend {
		return plural(l.Waiters, "waiter")
	}
	return l.title()
}

// alike gives all panels the same scale.
func alike(panels []panel) []panel {
	least, most := math.Inf(1), 0.0
	for _, p := range panels {
		least, most = min(least, p.least), max(most, p.most)
	}
	for i := range panels {
		panels[i].least, panels[i].most = least, most
	}
	return panels
}

func logarithmic(panels []panel) []panel {
	for i := range panels {
		panels[i].log = true
	}
	return panels
}

// row leaves out the panels that nobody has a part in, and who has no part in any.
func row(title string, panels []panel) chartRow {
	panels = slices.DeleteFunc(panels, func(p panel) bool {
		return !slices.ContainsFunc(p.bars, func(b bar) bool { return !b.absent })
	})
	absent := make(map[string]int) // from how many panels, by library
	for _, p := range panels {
		for _, b := range p.bars {
			if b.absent {
				absent[b.library]++
			}
		}
	}
	r := chartRow{title: title, panels: panels}
	for i := range panels {
		panels[i].bars = slices.DeleteFunc(panels[i].bars, func(b bar) bool { return absent[b.library] == len(panels) })
	}
	if len(panels) > 0 {
		for _, b := range panels[0].bars {
			r.names = append(r.names, b.library)
		}
	}
	return r
}

// Measures are in points. GitHub shows a chart about 800 pixels wide, which are 600 points.
const (
	chartWidth  = 600
	margin      = 10
	titleHeight = 20 // of a chart
	footHeight  = 18
	rowHeight   = 22 // of the title of a row
	panelHeight = 16 // of the title of a panel
	axisHeight  = 30
	barHeight   = 14
	gutter      = 82 // for the names of libraries
	panelGap    = 12
	tickWidth   = 22 // of the label of a tick, with the space around it

	// A bar leaves room for its label.
	longestBar = 0.72
)

var (
	ink    = color.Gray{0x1f}
	pencil = color.Gray{0x59}
	ruled  = color.Gray{0xdd}

	// This library stands out, its peers have the same weight among themselves, and the floors are in the background.
	ourColour   = color.RGBA{0xc8, 0x10, 0x2e, 0xff}
	peerColours = []color.RGBA{
		{0x5b, 0x8d, 0xb8, 0xff},
		{0x7b, 0xa7, 0x82, 0xff},
		{0xb5, 0xa2, 0x5e, 0xff},
		{0xa8, 0x86, 0xb4, 0xff},
		{0xcc, 0x9c, 0x86, 0xff},
	}
	floorColour = color.RGBA{0xbd, 0xbd, 0xbd, 0xff}
)

// colours returns the colour of each library, by its place among all.
func colours(libraries []Library) map[string]color.Color {
	of := make(map[string]color.Color)
	peers := 0
	for _, l := range libraries {
		switch {
		case l.Name == ours:
			of[l.Name] = ourColour
		case l.Floor:
			of[l.Name] = floorColour
		default:
			of[l.Name] = peerColours[peers%len(peerColours)]
			peers++
		}
	}
	return of
}

const middleOfCapitals = text.YAlignment(-0.40)

// lettering is text that is placed by its left end and the middle of its capitals, which is above that of the whole line.
func lettering(size vg.Length, c color.Color) text.Style {
	return text.Style{
		Color:   c,
		Font:    font.Font{Typeface: "Liberation", Variant: "Sans", Size: size},
		XAlign:  text.XLeft,
		YAlign:  middleOfCapitals,
		Handler: plot.DefaultTextHandler,
	}
}

// nameStyle is how a library's name and its figures look.
func nameStyle(library string) text.Style {
	s := lettering(8.5, ink)
	if library == ours {
		s.Font.Weight = xfont.WeightBold
	}
	return s
}

// svg draws the chart.
func (c chart) svg() []byte {
	height := vg.Length(2*margin + titleHeight + footHeight)
	for _, r := range c.rows {
		height += r.height()
	}
	canvas := vgsvg.New(chartWidth, height)
	page := draw.New(canvas)
	page.SetColor(color.White)
	page.Fill(page.Path())

	page = draw.Crop(page, margin, -margin, margin, -margin)
	title := lettering(11, ink)
	title.Font.Weight = xfont.WeightBold
	page.FillText(title, vg.Point{X: page.Min.X, Y: page.Max.Y - titleHeight/2}, c.title)
	foot := "Bars are medians, thin lines go from the least to the greatest repetition."
	if c.starved() {
		foot += " † Some waiter got nothing at all."
	}
	page.FillText(lettering(8, pencil), vg.Point{X: page.Min.X, Y: page.Min.Y + footHeight/2}, foot)
	page.Max.Y -= titleHeight
	for _, r := range c.rows {
		r.draw(draw.Crop(page, 0, 0, page.Max.Y-page.Min.Y-r.height(), 0), c.colour)
		page.Max.Y -= r.height()
	}

	var b bytes.Buffer
	_, _ = canvas.WriteTo(&b) // Nothing can go wrong in memory.
	// Few have Liberation Sans. Arial is as wide; without a substitute, browsers take a font with serifs.
	return bytes.ReplaceAll(b.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
}

// starved says whether there is a mark to explain.
func (c chart) starved() bool {
	return slices.ContainsFunc(c.rows, func(r chartRow) bool {
		return slices.ContainsFunc(r.panels, func(p panel) bool {
			return slices.ContainsFunc(p.bars, func(b bar) bool { return b.starved })
		})
	})
}

func (r chartRow) height() vg.Length {
	return vg.Length(rowHeight + panelHeight + axisHeight + barHeight*len(r.names))
}

func (r chartRow) draw(c draw.Canvas, colour map[string]color.Color) {
	c.FillText(lettering(9, pencil), vg.Point{X: c.Min.X, Y: c.Max.Y - rowHeight/2}, r.title)
	c = draw.Crop(c, 0, 0, 0, -rowHeight)
	for i, name := range r.names {
		s := nameStyle(name)
		s.XAlign = text.XRight
		c.FillText(s, vg.Point{X: c.Min.X + gutter - 6, Y: c.Max.Y - panelHeight - barHeight*(vg.Length(i)+0.5)}, name)
	}
	width := (c.Max.X - c.Min.X - gutter - panelGap*vg.Length(len(r.panels)-1)) / vg.Length(len(r.panels))
	for i, p := range r.panels {
		left := gutter + (width+panelGap)*vg.Length(i)
		p.draw(draw.Crop(c, left, left+width-(c.Max.X-c.Min.X), 0, 0), colour)
	}
}

// draw draws a plot. Its measures are fixed, so that bars are beside the names.
func (p panel) draw(c draw.Canvas, colour map[string]color.Color) {
	s := lettering(9, ink)
	c.FillText(s, vg.Point{X: c.Min.X, Y: c.Max.Y - panelHeight/2}, p.title)

	diagram := plot.New()
	diagram.BackgroundColor = nil
	diagram.HideY()
	diagram.Y.Padding = 0
	diagram.Y.Min, diagram.Y.Max = 0, float64(len(p.bars))
	diagram.X.Padding = 0
	diagram.X.LineStyle = draw.LineStyle{Color: pencil, Width: 0.5}
	diagram.X.Tick.LineStyle = diagram.X.LineStyle
	diagram.X.Tick.Length = 3
	diagram.X.Tick.Label = lettering(8, pencil)
	diagram.X.Tick.Label.XAlign, diagram.X.Tick.Label.YAlign = text.XCenter, text.YTop
	diagram.X.Label.Text = p.unit
	diagram.X.Label.TextStyle = lettering(8, pencil)
	diagram.X.Label.TextStyle.XAlign, diagram.X.Label.TextStyle.YAlign = text.XCenter, text.YBottom
	p.scale(&diagram.X, c.Max.X-c.Min.X)
	diagram.Add(barPlot{p.bars, colour})

	// What an axis takes depends on the font; the bars begin where they are meant to.
	c = draw.Crop(c, 0, 0, 0, -panelHeight)
	excess := c.Max.Y - c.Min.Y - (diagram.DataCanvas(c).Max.Y - diagram.DataCanvas(c).Min.Y) - axisHeight
	diagram.Draw(draw.Crop(c, 0, 0, -excess, 0))
}

// scale sets the range and the ticks of an axis, so that the longest bar leaves room for its label.
func (p panel) scale(axis *plot.Axis, width vg.Length) {
	least, most := p.least, p.most
	if most == 0 { // There is no bar.
		least, most = 1, 1
	}
	if !p.log {
		axis.Min, axis.Max = 0, most/longestBar
		axis.Tick.Marker = plot.ConstantTicks(ticks(most))
		return
	}
	// A bar has no natural beginning on a logarithmic scale. From half of the least on, all can be seen.
	axis.Min = least / 2
	axis.Max = axis.Min * math.Pow(most/axis.Min, 1/longestBar)
	axis.Scale = plot.LogScale{}
	marks := logTicks(axis.Min, axis.Max, 1, 2, 5)
	if width < tickWidth*vg.Length(len(marks)) {
		marks = logTicks(axis.Min, axis.Max, 1)
	}
	axis.Tick.Marker = plot.ConstantTicks(marks)
}

// ticks are at round numbers: two to five of them between 0 and most.
func ticks(most float64) []plot.Tick {
	step := math.Pow(10, math.Floor(math.Log10(most)))
	switch {
	case most/step < 2:
		step /= 2
	case most/step > 5:
		step *= 2
	}
	var ticks []plot.Tick
	for n := 0; float64(n)*step <= most; n++ {
		ticks = append(ticks, plot.Tick{Value: float64(n) * step, Label: tickLabel(float64(n) * step)})
	}
	return ticks
}

// logTicks are at powers of ten times the factors.
func logTicks(least, most float64, factors ...float64) []plot.Tick {
	var ticks []plot.Tick
	for exponent := math.Floor(math.Log10(least)); exponent <= math.Log10(most); exponent++ {
		for _, factor := range factors {
			if value := factor * math.Pow(10, exponent); value >= least && value <= most {
				ticks = append(ticks, plot.Tick{Value: value, Label: tickLabel(value)})
			}
		}
	}
	return ticks
}

// tickLabel is short, because ticks are at round numbers.
func tickLabel(x float64) string {
	if x >= 1000 {
		return strconv.FormatFloat(x/1000, 'g', 6, 64) + "k"
	}
	return strconv.FormatFloat(x, 'g', 6, 64)
}

// A barPlot draws bars from the top to the bottom, each with its spread and its label.
type barPlot struct {
	bars   []bar
	colour map[string]color.Color
}

// Plot implements plot.Plotter.
func (b barPlot) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	for _, tick := range p.X.Tick.Marker.Ticks(p.X.Min, p.X.Max) {
		c.StrokeLine2(draw.LineStyle{Color: ruled, Width: 0.5}, x(tick.Value), c.Min.Y, x(tick.Value), c.Max.Y)
	}
	for i, one := range b.bars {
		middle := y(float64(len(b.bars)-i) - 0.5)
		end := c.Min.X
		if f := one.figure; f.N > 0 {
			const half = barHeight * 0.36
			c.SetColor(b.colour[one.library])
			c.Fill(vg.Rectangle{
				Min: vg.Point{X: c.Min.X, Y: middle - half},
				Max: vg.Point{X: max(x(f.Median), c.Min.X), Y: middle + half},
			}.Path())
			end = max(x(f.Max), c.Min.X)
			if f.Min != f.Max {
				c.StrokeLine2(draw.LineStyle{Color: ink, Width: 0.75}, max(x(f.Min), c.Min.X), middle, end, middle)
			}
		}
		s := nameStyle(one.library)
		if one.figure.N == 0 {
			s = lettering(8, pencil)
		}
		c.FillText(s, vg.Point{X: end + 3, Y: middle}, one.label)
	}
	// The bars begin at a line.
	c.StrokeLine2(draw.LineStyle{Color: pencil, Width: 0.5}, c.Min.X, c.Min.Y, c.Min.X, c.Max.Y)
}

// empty says that there is nothing to show.
func (c chart) empty() bool { return len(c.rows) == 0 }
